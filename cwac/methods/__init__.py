"""One file a defence; each is a delta on plain fine-tuning (`base.Method`)."""
