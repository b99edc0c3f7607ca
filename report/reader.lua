-- Reads a JSON list of {"kind": ..., "text": ...}, each on its own, so that
-- no fence, footnote or link of one cell reaches into the next. One Div each.

local formats = {
  markdown = "commonmark+tex_math_dollars+pipe_tables+strikeout+footnotes",
  html = "html",
}

-- A cell is text: what looks like HTML is shown as it was typed. A table
-- is HTML, and keeps nothing but what pandoc knows of it.
local function literal(raw)
  local inlines = pandoc.Inlines{}
  for line in raw.text:gsub("\n+$", ""):gmatch("[^\n]*") do
    if #inlines > 0 then inlines:insert(pandoc.LineBreak()) end
    inlines:insert(pandoc.Str(line))
  end
  return inlines
end

local raw = {
  markdown = {
    RawInline = literal,
    RawBlock = function(el) return pandoc.Para(literal(el)) end,
  },
  html = {
    RawInline = function() return {} end,
    RawBlock = function() return {} end,
  },
}

function Reader(input)
  local pieces = pandoc.json.decode(tostring(input), false)
  return pandoc.Pandoc(pandoc.List(pieces):map(function(piece)
    local doc = pandoc.read(piece.text .. "\n", formats[piece.kind])
    return pandoc.Div(doc:walk(raw[piece.kind]).blocks)
  end))
end
