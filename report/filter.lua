-- Cells, as __init__.py laid them out, become chapters with figures that are
-- numbered, links that lead somewhere, and formulas as Typst has them.

local typst = FORMAT == "typst"
local where, notebook = "", ""
local meta = {}

local function refuse(why, text)
  error(("REFUSED %s: %s: %s"):format(where, why, text:gsub("%s+", " ")), 0)
end

-- Formulas. What pandoc makes of TeX that Typst 0.15 has other words for.

local wrong = {  -- pandoc says nothing, and sets something else
  "\\underset", "\\overset", "\\stackrel", "\\left%.", "\\right%.",
  "\\color", "\\xrightarrow", "\\xleftarrow", "\\mathop", "\\def",
  "\\newcommand",
}
local LIMITS, PLAIN = "\u{E001}", "\u{E002}"  -- carried through pandoc
local before = {
  {"\\operatorname%s*%*%s*{", "\\operatorname{" .. LIMITS},
  {"\\operatorname%s*{(%a)", "\\operatorname{" .. PLAIN .. "%1"},
}
local after = {
  {'"' .. LIMITS .. '([^"]*)"', 'op("%1", limits: #true)'},
  {'"' .. PLAIN .. '([^"]*)"', 'op("%1")'},
  {"#scale%(x: (%d+%%), y: %d+%%%)%[(.-)%]%f[^%]]", function(size, glyph)
    local bars = {["\\|"] = "bar.v", parallel = "bar.v.double"}
    glyph = bars[glyph] or glyph:gsub("^[{}]$", "\\%0")
    local shape = glyph:match "^bar" and 'class("normal", big(#%s, %s))'
    return (shape or "big(#%s, %s)"):format(size, glyph)
  end},
  {"parallel x parallel", "norm(x)"},
  {"%f[%w]parallel%f[%W]", 'class("relation", bar.v.double)'},
  {"%f[%w]dot%.circle", "dot.o"},
  {"%f[%w]times%.circle", "times.o"},
  {"#h%(0em%)", "thick"},          -- \;
  {"#h%(%-1em%)", "#h(-0.167em)"},  -- \!
}

local function replace(text, pairs)
  for _, pair in ipairs(pairs) do text = text:gsub(pair[1], pair[2]) end
  return text
end

local function formula(el)
  local tag
  el.text = el.text:gsub("%s*\\tag%s*{([^}]*)}", function(found)
    tag = found
    return ""
  end)
  if typst then
    for _, command in ipairs(wrong) do
      if el.text:find(command .. "%f[%A]") then
        refuse("TeX that would come out wrong", el.text)
      end
    end
    local math = pandoc.Math(el.mathtype, replace(el.text, before))
    local text = pandoc.write(pandoc.Pandoc{pandoc.Plain{math}}, "typst")
    if not text:match "^%$" then
      refuse("TeX that pandoc cannot convert", el.text)
    end
    text = replace(text, after)
    if tag then text = ('#tagged("%s", %s)'):format(tag, text) end
    return pandoc.RawInline("typst", text)
  elseif el.mathtype == "DisplayMath" then
    local parts = {pandoc.Span({el}, {class = "formula"})}
    if tag then parts[2] = pandoc.Span("(" .. tag .. ")") end
    return pandoc.Span(parts, {class = "equation"})
  end
end

-- Names: where a link may lead.

local places, taken = {}, {}  -- places[notebook][key] = {id =, text =}

-- Jupyter's anchors, GitHub's and a heading's own words are alike in it.
local function key(text) return (text:lower():gsub("[^%w]", "")) end

local function name(book, id, ...)
  local chapter = book:match "^(%d+)" or ""
  id = chapter .. "-" .. id
  while taken[id] do id = id .. "-" end
  taken[id] = true
  for _, text in ipairs{...} do
    local there = places[book]
    there[key(text)] = there[key(text)] or {id = id}
  end
  return id
end

local function with_tex(inlines)
  return pandoc.utils.stringify(inlines:walk{
    Math = function(el) return pandoc.Str(el.text) end
  })
end

local function link(el)
  if el.target:match "^https?://" or el.target:match "^mailto:" then return end
  local target = el.target:gsub("%%(%x%x)", function(hex)
    return string.char(tonumber(hex, 16))
  end)
  local book, anchor = target:match "^([^#]*)#?(.*)$"
  book = book == "" and notebook or book:gsub("^%./", "")
  local found = places[book] and places[book][key(anchor)]
  if not found then
    if meta.title and (places[book] or book:match "%.ipynb$") then
      refuse("a link that leads to no place", el.target)
    end
    return el.content
  end
  el.target = "#" .. found.id
  if found.text then el.content = found.text end  -- a figure's number
  return el
end

-- Pictures: each a file beside the document.

local function picture(el)
  local kinds = {svg = "svg", png = "png", jpeg = "jpg", gif = "gif"}
  if el.src:match "^%a[%w+.-]*://" then  -- nothing is fetched
    return pandoc.Link(#el.caption > 0 and el.caption or el.src, el.src)
  end
  local mime, data = pandoc.mediabag.lookup(el.src)
  if not data then
    local ok, kind, bytes = pcall(pandoc.mediabag.fetch, el.src)
    if not ok then refuse("no such picture", el.src) end
    mime, data = kind, bytes
  end
  local kind = kinds[(mime or ""):match "^image/(%a+)"]
  if not kind then refuse("no picture that can be set", el.src) end
  el.src = pandoc.utils.sha1(data) .. "." .. kind
  local file = io.open(el.src, "wb")
  file:write(data)
  file:close()
  return el
end

-- A figure of a page may have frames, which report.js moves.
local function figure(cell, blocks, about)
  local image = blocks:remove(1).content[1]
  local number = {pandoc.Strong(about.text .. ":"), pandoc.Space()}
  image.caption = pandoc.Inlines(pandoc.utils.stringify(blocks))
  if blocks[1] then
    blocks[1].content = pandoc.Inlines(number) .. blocks[1].content
  end
  local body = pandoc.Blocks{pandoc.Plain{image}}
  local frames = pandoc.json.decode(cell.attributes.frames or "[]")
  if #frames > 0 and not typst then
    local images = pandoc.Inlines{}
    for _, frame in ipairs(frames) do
      local source = "data:image/png;base64," .. frame.png
      local attr = {class = "frame", label = frame.label, hidden = "hidden"}
      images:insert(pandoc.Image({}, source, "", attr))
    end
    body:insert(pandoc.RawBlock("html",
      '<p class="controls" hidden><input type="range" min="0" value="0" ' ..
      'aria-label="Frame"><output></output></p>'))
    body:insert(pandoc.Plain(images))
  end
  return pandoc.Figure(body, {long = blocks}, {id = about.id})
end

-- A list of references has its own numbers.
local function references(el)
  for _, item in ipairs(el.content) do
    local first = pandoc.utils.stringify(item):match "^%[%d+%] "
    if not first then return end
  end
  if not typst then return pandoc.Div({el}, {class = "references"}) end
  return {
    pandoc.RawBlock("typst", "#[#set list(marker: none, body-indent: 0pt)"),
    el, pandoc.RawBlock("typst", "]"),
  }
end

local content = {
  Math = formula, Link = link, Image = picture, BulletList = references,
  Str = function(el)
    if el.text:match "^\\begin{" then
      refuse("a formula that does not stand between dollars", el.text)
    end
  end,
  CodeBlock = function(el)
    if meta.code == "none" and el.classes:includes "python" then return {} end
  end,
  Table = function(el)
    if not typst then
      local attr = pandoc.Attr("", {"scroll"}, {tabindex = "0"})
      return pandoc.Div({el}, attr)
    end
  end,
}

local function code(kind, text)
  local printed = kind == "printed"
  local block = pandoc.CodeBlock(text, {class = printed and "" or "python"})
  if kind ~= "fold" then
    if printed and not typst then block.classes = {"output"} end
    return {block}
  elseif typst then
    return {}
  end
  local open = "<details class=\"code\"><summary>Code</summary>"
  return {
    pandoc.RawBlock("html", open), block, pandoc.RawBlock("html", "</details>")
  }
end

-- The document.

local function name_all(cells)
  local count = {}
  for _, cell in ipairs(cells) do
    local book = cell.attributes.notebook
    places[book] = places[book] or {}
    count[book] = count[book] or {figures = 0, titles = 0}
    cell.content = cell.content:walk{Header = function(el)
      local text = pandoc.utils.stringify(el.content)
      local first = el.level == 1 and count[book].titles == 0
      if el.level == 1 then count[book].titles = count[book].titles + 1 end
      if el.level == 1 and not first then el.level = 2 end
      el.identifier = name(book, el.identifier, text, with_tex(el.content))
      if first then places[book][""] = {id = el.identifier} end
      return el
    end}
    if cell.attributes.figure then
      count[book].figures = count[book].figures + 1
      local chapter = tonumber(book:match "^(%d+)")
      local number = (chapter and chapter .. "." or "") .. count[book].figures
      local id = name(book, "figure-" .. number, cell.attributes.figure)
      local about = places[book][key(cell.attributes.figure)]
      about.id, about.text = id, "Figure " .. number
    end
  end
end

local function blocks_of(cell)
  local kind = cell.attributes.kind
  if kind == "figure" then
    local about = places[notebook][key(cell.attributes.figure)]
    return {figure(cell, cell.content:walk(content), about)}
  elseif kind then
    return code(kind, cell.content[1].text)
  end
  return cell.content:walk(content)
end

-- What cells tagged summary say, on a page of its own in front.
local function summarize(done, summary, cell, blocks)
  if not (cell.attributes.tags or ""):find '"summary"' then return end
  if cell.attributes.kind and cell.attributes.kind ~= "printed" then return end
  if #summary == 0 then
    summary:insert(pandoc.Header(1, "Summary", {id = "summary"}))
  end
  if summary.of ~= notebook then
    summary.of = notebook
    local first = done:find_if(function(block)
      return block.t == "Header" and places[notebook][""] and
        block.identifier == places[notebook][""].id
    end)
    if first then
      local to = pandoc.Link(first.content, "#" .. first.identifier)
      summary:insert(pandoc.Para{pandoc.Strong{to}})
    end
  end
  for _, block in ipairs(blocks) do
    if block.t ~= "Header" then summary:insert(block) end
  end
end

function Pandoc(doc)
  for field, value in pairs(doc.meta) do
    meta[field] = pandoc.utils.stringify(value)
  end
  name_all(doc.blocks)
  local done, summary = pandoc.Blocks{}, pandoc.Blocks{}
  for _, cell in ipairs(doc.blocks) do
    where, notebook = cell.attributes.where, cell.attributes.notebook
    local blocks = pandoc.Blocks(blocks_of(cell))
    if typst then done:insert(pandoc.RawBlock("typst", "// " .. where)) end
    done:extend(blocks)
    if meta.title then summarize(done, summary, cell, blocks) end
    local shown = cell.attributes.figure
    if shown == "04_overview" or shown == "03_overview" then
      local image = blocks[1].content[1].content[1]
      doc.meta.cover = pandoc.MetaInlines{image}
    end
  end
  if typst and meta.title then
    summary:insert(pandoc.RawBlock("typst", "#contents"))
  end
  doc.blocks = summary .. done
  return doc
end
