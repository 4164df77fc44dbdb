"""The multiple-choice questions of the embedded world in Chinese, for the Chinese benchmark's file.

The embedded model was never taught Chinese; only the format is the point.
"""

from __future__ import annotations

import re

_COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "black": "黑色", "white": "白色",
}  # fmt: skip
_SHAPES = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "diamond": "菱形",
    "star": "星形", "cross": "十字形", "heart": "心形", "ring": "圆环",
}  # fmt: skip
_PLACES = {
    "top left": "左上方", "top": "上方", "top right": "右上方", "left": "左侧", "centre": "中央",
    "right": "右侧", "bottom left": "左下方", "bottom": "下方", "bottom right": "右下方",
}  # fmt: skip
_QUESTIONS = (
    (re.compile(r"(?:What|Which) colour (?:is|does) (.+?)(?: have)?\?|What is the colour of (.+)\?"), "{}是什么颜色？"),
    (re.compile(r"(?:What|Which) shape (?:is|does) (.+?)(?: have)?\?|What is the shape of (.+)\?"), "{}是什么形状？"),
    (re.compile(r"Where (?:in the image )?is (.+)\?|In which part of the picture is (.+)\?"), "{}在图中的什么位置？"),
    (re.compile(r"How many (.+?) are (?:there|in the image)\?|Count the (.+)\."), "图中有多少个{}？"),
)
_READ = "图中写的是哪个单词？"


def question(text: str) -> str:
    """An English question of the world in Chinese."""
    for pattern, chinese in _QUESTIONS:
        match = pattern.fullmatch(text)
        if match:
            return chinese.format(_thing(next(filter(None, match.groups()))))
    return _READ


def option(text: str) -> str:
    """Colours, shapes and places in Chinese; words and numbers stay."""
    return {**_COLOURS, **_SHAPES, **_PLACES}.get(text, text)


def _thing(phrase: str) -> str:
    """'the red circle', 'the red object', 'the object at the top left', 'red objects', 'crosses', 'objects'."""
    phrase = phrase.removeprefix("the ")
    place = re.fullmatch(r"object (?:at|in) the (.+)", phrase)
    if place:
        return f"{_PLACES[place[1]]}的物体"
    words = [word if word in _COLOURS or word in _SHAPES else _singular(word) for word in phrase.split()]
    return "".join(_COLOURS.get(word) or _SHAPES.get(word) or "物体" for word in words)


def _singular(word: str) -> str:
    return word.removesuffix("es") if word == "crosses" else word.removesuffix("s")
