"""The words of the generated tables in Chinese, for README.zh-CN.md."""

import re

# A phrase and its translation; names of models, methods and scores stay as they are.
WORDS = {
    "method": "方法",
    "trained": "训练参数",
    "% of the weights": "占权重的 %",
    "seeds": "种子",
    "valid loss": "验证损失",
    "full fine-tuning": "全量微调",
    "training": "训练",
    "decoding": "解码",
    "batch": "批大小",
    "over transformers (+ peft, trl)": "相对于 transformers (+ peft, trl)",
    "raw files to scores": "从原始文件到分数",
    "sample": "样例",
    "over the original (derived)": "相对于原代码 (推算)",
    "by transformers' rules": "按 transformers 的规则",
    "per context (it takes one at a time)": "(每个上下文, 原代码一次处理一个)",
    "for the whole file": "(整个文件)",
    "of": "/",
    "to": "至",
}
NAMES = {"transformers", "peft", "trl", "small", "all"}
MARKS = {" (": "（", "(": "（", ")": "）", ", ": "，", "; ": "；"}


def translated(table: str) -> str:
    """Return a generated table with its words in Chinese; numbers and names stay."""
    return re.sub(r"[^|\n]+", lambda cell: _translated_cell(cell[0]), table)


def _translated_cell(cell: str) -> str:
    phrases = "|".join(re.escape(words) for words in sorted(WORDS, key=len, reverse=True))
    found = re.sub(rf"(?<![\w-])(?:{phrases})(?![\w-])", lambda match: WORDS[match[0]], cell)
    if found == cell:
        return cell
    for mark, full_width in MARKS.items():
        found = found.replace(mark, full_width)
    return found


def untranslated(table: str) -> set[str]:
    """Return the English words that a translated table still has."""
    return set(re.findall(r"(?<![\w-])[a-z]{3,}(?![\w-])", table)) - NAMES
