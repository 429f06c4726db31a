"""The programs that `launch/*.py` and `peft-dist` start in processes of their own."""
