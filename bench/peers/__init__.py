"""One adapter per peer: load() gives {op: function of the op's keyword arguments}, or raises what the import raises; DEVICES is where
they run."""
