"""Networks and programs that use `sos`; they are run from a checkout."""
