// Every picture opens as large as the window; a slider moves its frames.
// Without scripts the page shows the still pictures.
const dialog = document.querySelector("dialog");
const enlarged = dialog.querySelector("img");
dialog.addEventListener("click", () => dialog.close());
for (const img of document.querySelectorAll("main img:not(.frame)")) {
  const button = document.createElement("button");
  button.className = "enlarge";
  button.title = "Enlarge";
  img.replaceWith(button);
  button.append(img);
  button.addEventListener("click", () => {
    enlarged.src = img.src;
    enlarged.alt = img.alt;
    dialog.showModal();
  });
}
for (const controls of document.querySelectorAll(".controls")) {
  const figure = controls.closest("figure");
  const still = figure.querySelector("img");
  const frames = [...figure.querySelectorAll(".frame")];
  const input = controls.querySelector("input");
  input.max = frames.length - 1;
  const show = () => {
    const { src, dataset } = frames[input.value];
    still.src = src;
    input.nextElementSibling.value = dataset.label;
    input.setAttribute("aria-valuetext", dataset.label);
  };
  input.addEventListener("input", show);
  controls.hidden = false;
  show();
}
// On a narrow screen the contents start folded.
const narrow = matchMedia("(max-width: 69.99rem)").matches;
if (narrow) document.querySelector("nav details")?.removeAttribute("open");
