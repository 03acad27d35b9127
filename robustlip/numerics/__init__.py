"""Numbers and how they are rounded; nothing here knows a layer."""
