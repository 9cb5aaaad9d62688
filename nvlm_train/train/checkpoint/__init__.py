"""What a run can be continued from: written, published, verified, and read at any layout."""
