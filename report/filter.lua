-- Cells, as __init__.py laid them out, become a document.

local typst, stringify = FORMAT == "typst", pandoc.utils.stringify
local where, notebook, meta = "", "", {}

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
  local tex, tag = el.text:gsub("%s*\\tag%s*%b{}", ""), nil
  tag = el.text:match "\\tag%s*{([^}]*)}"
  if not typst then
    el.text = tex
    local parts = {pandoc.Span({el}, {class = "formula"})}
    if tag then parts[2] = pandoc.Span("(" .. tag .. ")") end
    return el.mathtype == "InlineMath" and el or
      pandoc.Span(parts, {class = "equation"})
  end
  for command in tex:gmatch "\\%a+[.*]?" do
    if wrong:find(" " .. command .. "%f[%s]") then
      refuse("TeX that would come out wrong", tex)
    end
  end
  el.text = tex:gsub("\\operatorname%s*{", "%0\u{E001}")
  local text = pandoc.write(pandoc.Pandoc{pandoc.Plain{el}}, "typst")
  if not text:match "^%$" then
    refuse("TeX that pandoc cannot convert", tex)
  end
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
  if found then
    return pandoc.Link(found.text or el.content, "#" .. found.id)
  elseif meta.title and book:match "%.ipynb$" then
    refuse("a link that leads to no place", el.target)
  end
  return el.content
end

-- Figures; on the screen with frames, where they have some.

local slider = [[<p class="controls" hidden><input type="range" min="0"
value="0" aria-label="Frame of this figure"><output></output></p>]]

local function figure(cell, blocks)
  local about = places[place(notebook, cell.attributes.figure)]
  local image = blocks:remove(1).content[1]
  image.caption = pandoc.Inlines(stringify(blocks))
  local number = pandoc.Strong(about.text .. ".")
  blocks[1] = blocks[1] or pandoc.Plain{}
  blocks[1].content = pandoc.Inlines{number, " "} .. blocks[1].content
  local body = pandoc.Blocks{pandoc.Plain{image}}
  local frames = typst and {} or pandoc.json.decode(cell.attributes.frames)
  if #frames > 0 then body:insert(pandoc.RawBlock("html", slider)) end
  for _, frame in ipairs(frames) do
    local attr = {class = "frame", label = frame.label, hidden = "hidden"}
    local source = "data:image/png;base64," .. frame.png
    body:insert(pandoc.Plain{pandoc.Image({}, source, "", attr)})
  end
  if meta.title and cell.attributes.figure:match "^0[34]_overview$" then
    meta.cover = pandoc.MetaBlocks{pandoc.Para{image}}
  end
  return {pandoc.Figure(body, {long = blocks}, {id = about.id})}
end

-- The rest of a cell, and the document.

local content = {
  Math = formula, Link = link,
  Image = function(el)  -- nothing is fetched
    if el.src:match "^%a+://" then return pandoc.Link(el.src, el.src) end
  end,
  Str = function(el)
    local bare = el.text:match "^\\begin{"
    return bare and refuse("a formula without its dollars", el.text)
  end,
  CodeBlock = function(el)
    if meta.code == "none" and el.classes[1] == "python" then return {} end
  end,
  BulletList = function(el)  -- references, with numbers of their own
    if not stringify(el.content[1]):match "^%[%d+%] " then return end
    return pandoc.Blocks(el.content:map(function(item)
      return pandoc.Para(item[1].content)
    end))
  end,
}

local function blocks_of(cell)
  local kind, block = cell.attributes.kind, cell.content[1]
  local html = function(text) return pandoc.RawBlock("html", text) end
  if not kind then return cell.content:walk(content) end
  if kind == "figure" then return figure(cell, cell.content:walk(content)) end
  if kind == "contents" then return {pandoc.RawBlock("typst", "#contents")} end
  if kind == "printed" then block.classes = {typst and "" or "output"} end
  if kind ~= "fold" then return {block} end
  local open = html "<details><summary>Code</summary>"
  return typst and {} or {open, block, html "</details>"}
end

local function name_all(cells)
  for _, cell in ipairs(cells) do
    local book, shown = cell.attributes.notebook, cell.attributes.figure
    cell.content = cell.content:walk{Header = function(el)
      local top, own = place(book, ""), place(book, stringify(el))
      el.identifier = fresh(el.identifier)
      if el.level == 1 and places[top] then el.level = 2 end
      places[top] = places[top] or {id = el.identifier}
      places[own] = places[own] or {id = el.identifier}
      return el
    end}
    if shown then
      local number = fresh(book:match "^0*(%d*)"):gsub("^%-", "")
      local text = "Figure " .. number:gsub("%-", ".")
      places[place(book, shown)] = {id = "Figure-" .. number, text = text}
    end
  end
end

function Pandoc(doc)
  for field, value in pairs(doc.meta) do meta[field] = value end
  meta.code = stringify(meta.code)
  name_all(doc.blocks)
  local done = pandoc.Blocks{}
  for _, cell in ipairs(doc.blocks) do
    where, notebook = cell.attributes.where, cell.attributes.notebook
    if typst then done:insert(pandoc.RawBlock("typst", "// " .. where)) end
    done:extend(blocks_of(cell))
  end
  if meta.cover then
    meta["include-before"] = {meta.cover, meta["include-before"]}
  end
  return pandoc.Pandoc(done, meta)
end
