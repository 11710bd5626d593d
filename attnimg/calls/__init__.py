"""What the calls of several backends share: arguments read, documents found, exact attention."""
