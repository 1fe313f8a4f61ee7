"""Attentive poolers: one file per family, all under one interface (`base`), made by name (`registry`)."""
