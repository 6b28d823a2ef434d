"""What a file can hold: names, sizes, layouts, dtypes and forms of storage."""
