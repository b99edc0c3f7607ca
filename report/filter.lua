-- Formulas, and what differs between the printed page and the screen.

local typst = FORMAT:match "typst"

-- Private characters carry through pandoc what its Typst has no words for.
local LIMITS, PLAIN, UNDER = "\u{E001}", "\u{E002}", "\u{E003}"
local OVER, AT, HELD = "\u{E004}", "\u{E005}", "\u{E006}"
local QUOTE, SLASH = "\u{E007}", "\u{E008}"

local before = {  -- TeX, for pandoc
  {"\\operatorname%s*%*%s*{", "\\operatorname{" .. LIMITS},
  {"\\operatorname%s*{([^\u{E001}])", "\\operatorname{" .. PLAIN .. "%1"},
  {"\\begin{vmatrix}", "\\left|\\begin{matrix}"},
  {"\\end{vmatrix}", "\\end{matrix}\\right|"},
  {"\\parallel%f[%A]", "\\;\\|\\;"},
  {"\\left%.(.-)\\right|_(%b{})", "\\underbrace{" .. AT .. "%1}_%2"},
  {"\\underset%s*(%b{})%s*(%b{})", "\\underbrace{" .. UNDER .. "%2}_%1"},
  {"\\overset%s*(%b{})%s*(%b{})", "\\overbrace{" .. OVER .. "%2}^%1"},
}

local strings = {  -- Typst, where pandoc's has a string
  {'"' .. LIMITS .. '([^"]*)"', 'op("%1", limits: #true)'},
  {'delim: "||"', 'delim: "‖"'},
  {'"' .. PLAIN .. '([^"]*)"', 'op("%1")'},
}

local after = {  -- Typst, as the compiler of today spells it
  {"underbrace%(%s*" .. AT, "at("},
  {"underbrace%(%s*" .. UNDER, "under("},
  {"overbrace%(%s*" .. OVER, "over("},
  {"#scale%(x: (%d+%%), y: %d+%%%)%[(.-)%]%f[^%]]", function(size, glyph)
    local bar = ({["\\|"] = "bar.v", parallel = "bar.v.double"})[glyph]
    if bar then
      return ('class("normal", big(#%s, %s))'):format(size, bar)
    end
    return ("big(#%s, %s)"):format(size, (glyph:gsub("^[{}]$", "\\%0")))
  end},
  {"cases%b()", function(body) return (body:gsub(" & ", " quad & ")) end},
  {"∥(.-)∥", "norm(%1)"},
  {"%f[%w]parallel%f[%W]", "double"},
  {"\\|(%w)", " single %1"},
  {"\\|", " single"},
  {"%f[%w]dot%.circle", "dot.o"},
  {"%f[%w]times%.circle", "times.o"},
  {"%f[%w]minus%.circle", "minus.o"},
  {"%f[%w]sect%f[%W]", "inter"},
  {"#h%(0em%)", "thick"},          -- \;
  {"#h%(%-1em%)", "#h(-0.167em)"},  -- \!
}

local function replace(text, pairs)
  for _, pair in ipairs(pairs) do text = text:gsub(pair[1], pair[2]) end
  return text
end

-- The words of \text{...} are strings, and stay as they are.
local function mend(text)
  local held = {}
  text = replace(text, {{'\\\\', SLASH}, {'\\"', QUOTE}})
  text = replace(text, strings):gsub('"[^"]*"', function(string)
    table.insert(held, string)
    return HELD .. #held .. HELD
  end)
  text = replace(text, after):gsub(HELD .. "(%d+)" .. HELD, function(k)
    return held[tonumber(k)]
  end)
  return replace(text, {{QUOTE, '\\"'}, {SLASH, '\\\\'}})
end

local function refuse(why, tex)
  error("REFUSED " .. why .. ": " .. tex:gsub("%s+", " "), 0)
end

local function to_typst(math)
  local copy = pandoc.Math(math.mathtype, replace(math.text, before))
  local text = pandoc.write(pandoc.Pandoc{pandoc.Plain{copy}}, "typst")
  if not text:match "^%$" then
    refuse("TeX that pandoc cannot convert", math.text)
  end
  return mend(text)
end

function Math(el)
  local tag, more
  el.text = el.text:gsub("%s*\\tag%*?%s*{([^}]*)}", function(found)
    tag, more = found, tag
    return ""
  end)
  if more then refuse("two \\tag in one formula", el.text) end
  if tag and not tag:match "^[%w.'*-]+$" then refuse("\\tag", tag) end
  local text = to_typst(el)
  if typst then
    if tag then text = ('#tagged("%s", %s)'):format(tag, text) end
    return pandoc.RawInline("typst", text)
  elseif el.mathtype == "DisplayMath" then
    local parts = {pandoc.Span({el}, pandoc.Attr("", {"formula"}))}
    if tag then
      parts[2] = pandoc.Span("(" .. tag .. ")", pandoc.Attr("", {"tag"}))
    end
    return pandoc.Span(parts, pandoc.Attr("", {"equation"}))
  end
end

-- What a cell printed has no language; on the page that is its mark.
function CodeBlock(el)
  if typst and el.classes:includes "output" then
    return pandoc.CodeBlock(el.text)
  end
end

function Div(el)
  if el.classes:includes(typst and "screen" or "page") then return {} end
  if el.classes:includes "screen" or el.classes:includes "page" then
    return el.content
  end
  if typst and el.classes:includes "reference" then
    local number = el.attributes.number
    local open = ('#reference("%s")['):format(number)
    return pandoc.Blocks{pandoc.RawBlock("typst", open)} .. el.content ..
      {pandoc.RawBlock("typst", ("] <%s>"):format(el.identifier))}
  end
end

-- The line that introduces a table stays on its page.
function Blocks(blocks)
  if not typst then return end
  local done = pandoc.Blocks{}
  for k, block in ipairs(blocks) do
    local follows = blocks[k + 1]
    if follows and follows.t == "Plain"
        and pandoc.utils.stringify(follows) == "" then  -- a table's own style
      follows = blocks[k + 2]
    end
    if block.t == "Para" and follows and follows.t == "Table" then
      done:insert(pandoc.RawBlock("typst", "#block(sticky: true)["))
      done:insert(block)
      done:insert(pandoc.RawBlock("typst", "]"))
    else
      done:insert(block)
    end
  end
  return done
end

function Table(el)
  if not typst then
    local attr = pandoc.Attr("", {"scroll"}, {tabindex = "0"})
    return pandoc.Div({el}, attr), false
  end
end
