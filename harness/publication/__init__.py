"""Publishing a variant: `folder` assembles and checks what is uploaded, `leaks` searches it for what belongs to this
machine, `hub` uploads it."""
