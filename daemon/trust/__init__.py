"""How far feedback is believed: rules by source, likeness, drift, blocked words, personal data. Pure; no SQL here."""
