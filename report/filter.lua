-- Cells, as __init__.py laid them out, become a document.
local typst, stringify = FORMAT == "typst", pandoc.utils.stringify
local where, notebook, cover, meta, pictures = "", "", nil, {}, {}

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

-- Words in quotes, as of \text, stay as they are.
local function mend(code, words)
  for _, pair in ipairs(mended) do code = code:gsub(pair[1], pair[2]) end
  return code .. words:gsub('^"\u{E001}(.*)"$', 'op("%1")')
end

local function formula(el)
  local text, tags = el.text:gsub("\xEE\x80[\x81-\x83]", "")
  text = text:gsub("%s*\\label%s*%b{}", "")
  local tag = text:match "\\tag%s*(%b{})"
  el.text, tags = text:gsub("%s*\\tag%s*%b{}", "")
  if tags > 1 then refuse("TeX with two tags", text) end
  tag = tag and tag:sub(2, -2)
  local plain = el:clone()
  el.text = el.text:gsub("\\operatorname%s*{", "%0\u{E001}")
  text = pandoc.write(pandoc.Pandoc{pandoc.Plain{el}}, "typst")
  if not text:match "^%$.*%$%s*$" then
    refuse("TeX unknown to pandoc", plain.text)
  end
  if not typst and plain.mathtype == "InlineMath" then return plain end
  if not typst then
    local number = tag and "(" .. tag .. ")" or ""
    local scroll = pandoc.Span(plain, {class = "formula"})
    return pandoc.Span({scroll, number}, {class = "equation"})
  end
  for command in plain.text:gmatch "\\%a+[.*]?" do
    if wrong:find(command:gsub("%p", "%%%0") .. "%f[%s]") then
      refuse("TeX that would come out wrong", plain.text)
    end
  end
  text = text:gsub('\\["\\]', {['\\"'] = "\u{E002}", ["\\\\"] = "\u{E003}"})
  text = text:gsub('([^"]*)("?[^"]*"?)', mend)
  text = text:gsub("\u{E002}", '\\"'):gsub("\u{E003}", "\\\\")
  tag = tag and tag:gsub('["\\]', "\\%0")
  if tag then text = ('#tagged("%s", %s)'):format(tag, text) end
  return pandoc.RawInline("typst", text)
end

-- Links. places[place] = {id =, title =}; a heading's words, its anchor in
-- Jupyter and that on GitHub make the same place: letters of all alphabets
-- and digits, without ASCII's, Latin-1's and general punctuation.

local places, figures, count = {}, {}, {}
local function place(book, anchor)
  local letters = pandoc.text.lower(anchor):gsub("[\1-/:-@%[-`{-\127]", "")
  letters = letters:gsub("\xC2[\x80-\xBF]", "")
  return book .. "#" .. letters:gsub("\xE2[\x80\x81][\x80-\xBF]", "")
end

local function fresh(name)
  count[name] = (count[name] or 0) + 1
  return name .. "-" .. count[name]
end

local function link(el)
  local target = el.target
  if target:lower():match "^https?://" or target:lower():match "^mailto:" then
    return
  end
  local decoded = target:gsub("%%(%x%x)", function(hex)
    return string.char(tonumber(hex, 16))
  end)
  target = utf8.len(decoded) and decoded or target
  local book, anchor = target:match "^([^#]*)#?(.*)$"
  book = book == "" and notebook or book:gsub("^%./", "")
  local key = place(book, anchor)
  local found = figures[key] or places[key]
  if found and found.text then  -- a figure: its number after the words
    return el.content .. {" (", pandoc.Link(found.text, "#" .. found.id), ")"}
  elseif #el.content == 0 then  -- a notebook: by its title
    if not found then return pandoc.Str(book) end
    el.content = found.title
  end
  if found then return pandoc.Link(el.content, "#" .. found.id) end
  if meta.title and book:match "%.ipynb$" then
    refuse("a link that leads to no place", el.target)
  end
  return el.content
end

-- A figure; on the screen with frames, where it has some, for page.html.
local function figure(cell, blocks)
  local about = figures[cell.identifier]
  local image = blocks:remove(1).content[1]
  local plain = cell.content:clone()  -- with its formulas as they are typed
  plain:remove(1)
  image.caption = pandoc.Inlines(stringify(plain))
  local number = pandoc.Strong(about.text .. ".")
  local first = blocks[1] and blocks[1].t
  if first ~= "Para" then blocks:insert(1, pandoc.Para{}) end
  blocks[1].content = pandoc.Inlines{number, " "} .. blocks[1].content
  local images = pandoc.Inlines{image}
  for _, frame in ipairs(pandoc.json.decode(cell.attributes.frames)) do
    local source = "data:image/png;base64," .. frame.png
    local attr = {class = "frame", label = tostring(frame.label)}
    if not typst then images:insert(pandoc.Image("", source, "", attr)) end
  end
  local words = stringify(image.caption):gsub('["\\]', "\\%0")
  local alt = pandoc.RawBlock("typst", ('#[#set image(alt: "%s")'):format(words))
  local close = pandoc.RawBlock("typst", "]")
  if meta.title and cell.attributes.figure:match "^0[34]_overview$" then
    cover = {alt, pandoc.Para{image}, close}
  end
  local body = pandoc.Blocks{pandoc.Plain(images)}
  local made = pandoc.Figure(body, {long = blocks}, {id = about.id})
  if not typst then return {made} end
  if about.text:match "%.1$" then  -- stays below the notebook's title
    alt.text = alt.text .. "\n#show figure: set figure(placement: none)"
  end
  return {alt, made, close}
end

-- The rest of a cell, and the document.
local content = {
  Math = formula, Link = link,
  Image = function(el)  -- nothing is fetched
    if pictures[el.src] then el.src = pictures[el.src] return el end
    return pandoc.Link(el.src, el.src)
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
  if kind == "answers" then
    local words = cell.content:walk(content)
    if typst then return words end
    words:insert(1, html "<details><summary>Answers</summary>")
    words:insert(html "</details>")
    return words
  end
  if kind == "printed" then block.classes = {""} end
  if kind ~= "fold" then return {block} end
  local open = html "<details><summary>Code</summary>"
  return typst and {} or {open, block, html "</details>"}
end

local unlisted = {Results = true, ["Try this"] = true, References = true,
  ["Check yourself"] = true, ["What the source wrote"] = true}

local function name_all(cell)
  local book, shown = cell.attributes.notebook, cell.attributes.figure
  cell.content = cell.content:walk{Header = function(el)
    el.identifier = fresh(el.identifier)
    local here, top = {id = el.identifier, title = el.content}, place(book, "")
    if el.level == 1 and places[top] then el.level = 2 end
    local summary = book == "summary" and el.level > 1
    if summary and not typst then el.level = 2 end  -- no level is skipped
    if unlisted[stringify(el)] or summary then  -- not in the contents
      el.classes = {"unlisted", "unnumbered"}
    end
    places[top] = places[top] or here
    places[place(book, stringify(el))] = here
    return el
  end}
  if shown then
    local number = fresh(book:match "^0*(%d*)"):gsub("^%-", "")
    local text = "Figure " .. number:gsub("%-", ".")
    figures[cell.identifier] = {id = "Figure-" .. number, text = text}
    figures[place(book, shown)] = figures[cell.identifier]
  end
end

-- For Python: a line for each picture, of which cell it is, and its source.
local function list(cells)
  local lines = pandoc.List{}
  for _, cell in ipairs(cells) do
    cell:walk{Image = function(el)
      local web = el.src:lower():match "^https?://"
      if not web then
        lines:insert(pandoc.json.encode{cell.identifier, el.src})
      end
    end}
  end
  return pandoc.Pandoc{pandoc.RawBlock("plain", table.concat(lines, "\n"))}
end

function Pandoc(doc)
  if FORMAT == "plain" then return list(doc.blocks) end
  meta = doc.meta.jupyter.report or {}
  local before, done = pandoc.Blocks{}, pandoc.Blocks{}
  for _, changed in ipairs(meta.changed or {}) do
    local said = "Other parameters in " .. changed[1] .. ": "
    before:insert(pandoc.Para{pandoc.Str(said), pandoc.Code(changed[2])})
  end
  if #before > 0 then
    before:insert(pandoc.Para{pandoc.Str("Sentences describe the homework's " ..
      "own settings; what is printed is this run's.")})
  end
  for _, cell in ipairs(doc.blocks) do name_all(cell) end
  for _, cell in ipairs(doc.blocks) do
    where, notebook = cell.attributes.where, cell.attributes.notebook
    pictures = pandoc.json.decode(cell.attributes.pictures or "{}")
    local mark = pandoc.RawBlock("typst", "// " .. cell.identifier)
    if typst then done:insert(mark) end
    local ok, blocks = pcall(blocks_of, cell)
    if not ok and tostring(blocks):match "REFUSED" then error(blocks, 0) end
    if not ok then refuse("cannot be laid out", tostring(blocks)) end
    done:extend(blocks)
  end
  before:extend(cover or {})
  if not typst then done = before .. done end  -- below the title
  return pandoc.Pandoc(done, {
    title = meta.title, pagetitle = meta.pagetitle, lang = "en",
    ["include-before"] = typst and before or nil,
  })
end
