"""The text that `tiny` is trained on, generated from a seeded grammar."""

from tools.train_tiny.corpus.conversation import Conversation, Document, Json, Message, PlainText
from tools.train_tiny.corpus.mixture import documents, questions

__all__ = ["Conversation", "Document", "Json", "Message", "PlainText", "documents", "questions"]
