"""Publishing a variant: `folder` assembles and checks what is uploaded, `upload` sends it to the Hub."""
