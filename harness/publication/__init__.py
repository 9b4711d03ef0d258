"""Publishing a variant: `folder` assembles and checks what is uploaded, `leaks` searches it for what belongs to this
machine, `upload` sends it to the Hub."""
