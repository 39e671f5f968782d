"""From a request to pictures with receipts."""
