"""The Monitor page and every chart: what each device did with the last seconds."""
