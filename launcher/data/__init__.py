"""Data: records in, packed rows of token ids out; made once by `prepare`, then only opened by the ranks."""
