"""Rules that clean a document, or drop it: `chosen(["gopher", "c4"], {"gopher-words": {"least": 40}}).clean(text)`.

The modules are imported in the order in which their rules act.
"""

from thriftlab.data.prepare.rules import refinedweb, c4, gopher, fineweb, repetition  # noqa: F401, I001
from thriftlab.data.rules import RULES, Rule, document_rule, line_rule
from thriftlab.data.prepare.rules.selection import Cleaned, Finding, Rules, chosen, families

__all__ = ["RULES", "Cleaned", "Finding", "Rule", "Rules", "chosen", "document_rule", "families", "line_rule"]
