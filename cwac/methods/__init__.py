"""One file a defence, each a delta on plain fine-tuning (`base.Method`); may import core to constraints."""
