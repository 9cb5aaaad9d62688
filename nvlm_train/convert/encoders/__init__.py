"""Vision encoders as tables: what each kind's files may say and hold, one file an origin of weights."""
