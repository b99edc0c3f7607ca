-- Cells, as __init__.py laid them out, become a document.
local typst, stringify = FORMAT == "typst", pandoc.utils.stringify
local where, notebook, cover, meta = "", "", nil, {}

local function refuse(why, text)
  error(("REFUSED %s: %s: %s"):format(where, why, text:gsub("%s+", " ")), 0)
end
-- Formulas: what pandoc says otherwise than Typst 0.15, where the notebooks
-- use it. What would come out wrong without a word, is refused.
local wrong = [[ \underset \overset \stackrel \left. \right. \color \mathop
  \operatorname* \xrightarrow \xleftarrow \def \newcommand ]]
local mended = {
  {"#scale%(x: (%d+%%), y: %d+%%%)%[(.-)%]%f[^%]]", function(size, glyph)
    local bar = glyph == "\\|" and 'class("normal", big(#%s, bar.v))'
    glyph = glyph:gsub("^[{}]$", "\\%0")
    return (bar or "big(#%s, %s)"):format(size, glyph)
  end},
  {"\\|", 'class("normal", bar.v) '},
  {"%f[%w]parallel%f[%W]", 'class("normal", bar.v.double)'},
  {'"\u{E001}([^"]*)"', 'op("%1")'},
  {"%f[%w]dot%.circle", "dot.o"},
  {"%f[%w]times%.circle", "times.o"},
  {"#h%(0em%)", "thick"},          -- \;
  {"#h%(%-1em%)", "#h(-0.167em)"},  -- \!
}

local function formula(el)
  local tag = el.text:match "\\tag%s*{([^}]*)}"
  el.text = el.text:gsub("%s*\\tag%s*%b{}", "")
  if not typst and el.mathtype == "InlineMath" then return el end
  if not typst then
    local number = tag and "(" .. tag .. ")" or ""
    local scroll = pandoc.Span(el, {class = "formula"})
    return pandoc.Span({scroll, number}, {class = "equation"})
  end
  for command in el.text:gmatch "\\%a+[.*]?" do
    if wrong:find(command:gsub("%p", "%%%0") .. "%f[%s]") then
      refuse("TeX that would come out wrong", el.text)
    end
  end
  el.text = el.text:gsub("\\operatorname%s*{", "%0\u{E001}")
  local text = pandoc.write(pandoc.Pandoc{pandoc.Plain{el}}, "typst")
  if not text:match "^%$" then refuse("TeX unknown to pandoc", el.text) end
  for _, pair in ipairs(mended) do text = text:gsub(pair[1], pair[2]) end
  if tag then text = ('#tagged("%s", %s)'):format(tag, text) end
  return pandoc.RawInline("typst", text)
end

-- Links. places[place] = {id =, text =}; a heading's words, its anchor in
-- Jupyter and that on GitHub make the same place.

local places, count = {}, {}
local function place(book, anchor)
  return book .. "#" .. anchor:lower():gsub("[^%w]", "")
end

local function fresh(name)
  count[name] = (count[name] or 0) + 1
  return name .. "-" .. count[name]
end

local function link(el)
  if el.target:match "^https?://" or el.target:match "^mailto:" then return end
  local book, anchor = el.target:match "^([^#]*)#?(.*)$"
  book = book == "" and notebook or book:gsub("^%./", "")
  local found = places[place(book, anchor)]
  if found and found.text then  -- a figure: its number after the words
    return el.content .. {" (", pandoc.Link(found.text, "#" .. found.id), ")"}
  elseif found then return pandoc.Link(el.content, "#" .. found.id) end
  if meta.title and book:match "%.ipynb$" then
    refuse("a link that leads to no place", el.target)
  end
  return el.content
end

-- A figure; on the screen with frames, where it has some, for page.html.
local function figure(cell, blocks)
  local about = places[place(notebook, cell.attributes.figure)]
  local image = blocks:remove(1).content[1]
  image.caption = pandoc.Inlines(stringify(blocks))
  local number = pandoc.Strong(about.text .. ".")
  blocks[1] = blocks[1] or pandoc.Plain{}
  blocks[1].content = pandoc.Inlines{number, " "} .. blocks[1].content
  local images = pandoc.Inlines{image}
  for _, frame in ipairs(pandoc.json.decode(cell.attributes.frames)) do
    local source = "data:image/png;base64," .. frame.png
    local attr = {class = "frame", label = frame.label}
    if not typst then images:insert(pandoc.Image("", source, "", attr)) end
  end
  if meta.title and cell.attributes.figure:match "^0[34]_overview$" then
    cover = pandoc.MetaBlocks{pandoc.Para{image}}
  end
  local body = pandoc.Blocks{pandoc.Plain(images)}
  return {pandoc.Figure(body, {long = blocks}, {id = about.id})}
end

-- The rest of a cell, and the document.
local content = {
  Math = formula, Link = link,
  Image = function(el)  -- nothing is fetched
    if el.src:match "^%a+://" then return pandoc.Link(el.src, el.src) end
  end,
  Str = function(el)
    if el.text:match "^\\begin{" then refuse("TeX without $$", el.text) end
  end,
  CodeBlock = function(el)
    return meta.code == "none" and el.classes[1] == "python" and {} or el
  end,
}

local function blocks_of(cell)
  local kind, block = cell.attributes.kind, cell.content[1]
  local html = function(text) return pandoc.RawBlock("html", text) end
  if not kind then return cell.content:walk(content) end
  if kind == "figure" then return figure(cell, cell.content:walk(content)) end
  if kind == "contents" then return {pandoc.RawBlock("typst", "#contents")} end
  if kind == "printed" then block.classes = {""} end
  if kind ~= "fold" then return {block} end
  local open = html "<details><summary>Code</summary>"
  return typst and {} or {open, block, html "</details>"}
end

local function name_all(cell)
  local book, shown = cell.attributes.notebook, cell.attributes.figure
  cell.content = cell.content:walk{Header = function(el)
    el.identifier = fresh(el.identifier)
    local here, top = {id = el.identifier}, place(book, "")
    if el.level == 1 and places[top] then el.level = 2 end
    if ("Results Try this References"):find(stringify(el), 1, true) then
      el.classes = {"unlisted", "unnumbered"}  -- not in the contents
    end
    places[top] = places[top] or here
    places[place(book, stringify(el))] = here
    return el
  end}
  if shown then
    local number = fresh(book:match "^0*(%d*)"):gsub("^%-", "")
    local text = "Figure " .. number:gsub("%-", ".")
    places[place(book, shown)] = {id = "Figure-" .. number, text = text}
  end
end

function Pandoc(doc)
  for field, value in pairs(doc.meta) do meta[field] = value end
  meta.code = stringify(meta.code)
  for _, cell in ipairs(doc.blocks) do name_all(cell) end
  local done = pandoc.Blocks{}
  for _, cell in ipairs(doc.blocks) do
    where, notebook = cell.attributes.where, cell.attributes.notebook
    if typst then done:insert(pandoc.RawBlock("typst", "// " .. where)) end
    done:extend(blocks_of(cell))
  end
  if cover then meta["include-before"]:insert(cover) end
  return pandoc.Pandoc(done, meta)
end
