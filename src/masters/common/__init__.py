"""Errors, digests, redaction and facts about this machine; imports no other package of Masters."""
