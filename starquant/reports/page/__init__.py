"""Records as one page: self-contained HTML that opens from disk, fetches nothing and takes no markup from records."""
