-- Cells, as __init__.py laid them out, become a document: figures with
-- numbers, links that lead somewhere, and formulas as Typst has them.

local typst = FORMAT == "typst"
local where, notebook, meta = "", "", {}
local stringify = pandoc.utils.stringify

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
  {'"\u{E001}([^"]*)"', 'op("%1")'},
  {"%f[%w]parallel%f[%W]", 'class("normal", bar.v.double)'},
  {"%f[%w]dot%.circle", "dot.o"},
  {"%f[%w]times%.circle", "times.o"},
  {"#h%(0em%)", "thick"},          -- \;
  {"#h%(%-1em%)", "#h(-0.167em)"},  -- \!
}

local function formula(el)
  local tag
  el.text = el.text:gsub("%s*\\tag%s*{([^}]*)}", function(found)
    tag = found
    return ""
  end)
  if not typst then
    if el.mathtype == "InlineMath" then return el end
    local parts = {pandoc.Span({el}, {class = "formula"})}
    if tag then parts[2] = pandoc.Span("(" .. tag .. ")") end
    return pandoc.Span(parts, {class = "equation"})
  end
  for command in el.text:gmatch "\\%a+[.*]?" do
    if wrong:find(" " .. command .. " ", 1, true) then
      refuse("TeX that would come out wrong", el.text)
    end
  end
  el.text = el.text:gsub("\\operatorname%s*{", "%0\u{E001}")
  local text = pandoc.write(pandoc.Pandoc{pandoc.Plain{el}}, "typst")
  if not text:match "^%$" then
    refuse("TeX that pandoc cannot convert", el.text)
  end
  for _, pair in ipairs(mended) do text = text:gsub(pair[1], pair[2]) end
  if tag then text = ('#tagged("%s", %s)'):format(tag, text) end
  return pandoc.RawInline("typst", text)
end

-- Links. places[notebook][key] = {id =, text =}; a heading's words, its
-- anchor in Jupyter and on GitHub have the same key.

local places, taken = {}, {}
local function key(text) return (text:lower():gsub("[^%w]", "")) end

local function name(book, slug, ...)
  local id = (book:match "^%d+" or "") .. "-" .. slug
  while taken[id] do id = id .. "-" end
  taken[id] = true
  for _, text in ipairs{...} do
    places[book][key(text)] = places[book][key(text)] or {id = id}
  end
  return id
end

local function link(el)
  if el.target:match "^https?://" or el.target:match "^mailto:" then return end
  local book, anchor = el.target:gsub("%%(%x%x)", function(hex)
    return string.char(tonumber(hex, 16))
  end):match "^([^#]*)#?(.*)$"
  book = book == "" and notebook or book:gsub("^%./", "")
  local found = places[book] and places[book][key(anchor)]
  if found then
    return pandoc.Link(found.text or el.content, "#" .. found.id)
  elseif meta.title and book:match "%.ipynb$" then
    refuse("a link that leads to no place", el.target)
  end
  return el.content
end

-- Figures; on the screen with frames, where they have some.

local function figure(cell, blocks)
  local about = places[notebook][key(cell.attributes.figure)]
  local image = blocks:remove(1).content[1]
  if not blocks[1] then blocks:insert(pandoc.Plain{}) end
  image.caption = pandoc.Inlines(stringify(blocks))
  local body = pandoc.Blocks{pandoc.Plain{image}}
  local number = pandoc.Inlines{pandoc.Strong(about.text .. "."), " "}
  blocks[1].content = number .. blocks[1].content
  local frames = typst and {} or pandoc.json.decode(cell.attributes.frames)
  for k, frame in ipairs(frames) do
    if k == 1 then
      body:insert(pandoc.RawBlock("html",
        '<p class="controls" hidden><input type="range" min="0" value="0"' ..
        ' aria-label="Frame of this figure"><output></output></p>'))
    end
    local attr = {class = "frame", label = frame.label, hidden = "hidden"}
    local source = "data:image/png;base64," .. frame.png
    body:insert(pandoc.Plain{pandoc.Image({}, source, "", attr)})
  end
  if cell.attributes.figure:match "^0[34]_overview$" then
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
    if el.text:match "^\\begin{" then
      refuse("a formula without its dollars", el.text)
    end
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
  if kind == "figure" then return figure(cell, cell.content:walk(content)) end
  if kind == "contents" then
    return {pandoc.RawBlock("typst", "#contents")}
  elseif kind == "printed" then
    block.classes = {typst and "" or "output"}
  elseif kind == "fold" then
    local open = '<details class="code"><summary>Code</summary>'
    local html = pandoc.RawBlock
    return typst and {} or
      {html("html", open), block, html("html", "</details>")}
  end
  return kind and {block} or cell.content:walk(content)
end

local function name_all(cells)
  local figures, title = {}, {}
  for _, cell in ipairs(cells) do
    local book, shown = cell.attributes.notebook, cell.attributes.figure
    places[book], figures[book] = places[book] or {}, figures[book] or 0
    cell.content = cell.content:walk{Header = function(el)
      local tex = el.content:walk{Math = function(math)
        return pandoc.Str(math.text)
      end}
      el.identifier = name(book, el.identifier, stringify(el), stringify(tex))
      if el.level == 1 and title[book] then el.level = 2 end
      title[book] = title[book] or el.identifier
      places[book][""] = {id = title[book]}
      return el
    end}
    if shown then
      figures[book] = figures[book] + 1
      local chapter = tonumber(book:match "^%d+")
      local number = (chapter and chapter .. "." or "") .. figures[book]
      local id = name(book, "figure-" .. number)
      places[book][key(shown)] = {id = id, text = "Figure " .. number}
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
  meta["include-before"] = pandoc.List(meta.parameters or {}):map(function(text)
    local said = pandoc.Inlines{"With other parameters, "} .. text
    return pandoc.MetaBlocks{pandoc.Para(said)}
  end)
  if meta.title then meta["include-before"]:insert(meta.cover) end
  return pandoc.Pandoc(done, meta)
end
