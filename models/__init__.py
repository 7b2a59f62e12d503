"""Networks, tasks and programs that use `sos`; run them from a checkout."""
