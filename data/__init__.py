"""Text to windows: batch = f(plan, step). `thriftlab.data.loader` is apart, because it imports torch."""

from thriftlab.data.errors import DataError
from thriftlab.data.mixture import Plan, Source, plan
from thriftlab.data.order import permute, stream
from thriftlab.data.repetition import ControlledRepetition
from thriftlab.data.rules import document_rule, line_rule
from thriftlab.data.shards import Dataset, Windows, open_dataset, write_manifest, write_shards, write_tokenizer
from thriftlab.data.tokens import Tokenizer, encode_document, load_tokenizer, train_bpe

__all__ = [
    "ControlledRepetition",
    "DataError",
    "Dataset",
    "Plan",
    "Source",
    "Tokenizer",
    "Windows",
    "document_rule",
    "encode_document",
    "line_rule",
    "load_tokenizer",
    "open_dataset",
    "permute",
    "plan",
    "stream",
    "train_bpe",
    "write_manifest",
    "write_shards",
    "write_tokenizer",
]
