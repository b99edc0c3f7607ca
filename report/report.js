// Sliders over the frames of a figure. Without scripts the first one shows.
for (const box of document.querySelectorAll(".frames")) {
  const frames = [...box.querySelectorAll(".frame")];
  const input = box.querySelector("input");
  const output = box.querySelector("output");
  const button = box.querySelector("button");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let timer = null;

  const show = (k) => {
    frames.forEach((frame, i) => (frame.hidden = i !== k));
    input.value = k;
    output.value = frames[k].dataset.label;
    input.setAttribute("aria-valuetext", output.value);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    if (button) button.textContent = "Play";
  };
  const next = () => {
    const k = Number(input.value) + 1;
    if (k < frames.length) show(k);
    if (k >= frames.length - 1) stop();
  };
  input.addEventListener("input", () => {
    stop();
    show(Number(input.value));
  });
  // Nothing moves for a reader who asked for stillness: a press is a step.
  button?.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(input.value) === frames.length - 1) show(0);
    if (still.matches) return next();
    button.textContent = "Pause";
    timer = setInterval(next, 250);
  });
  box.querySelector(".controls").hidden = false;
  show(Number(input.value));
}
// On a narrow screen the contents start folded.
if (matchMedia("(max-width: 69.99rem)").matches) {
  document.querySelector("nav details").open = false;
}
