"""smol's four tasks: generators of items, items that are shipped, how answers are scored."""
