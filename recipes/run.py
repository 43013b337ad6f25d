"""Run one recipe on one model, save the checkpoint, and say what it cost and what it saved.

    python recipes/run.py recipes/cur_then_gptq.yaml --model MODEL --calibrate TEXT --output OUT

The command is that of ``cur_modifier/compress.py``, which says what the arguments may be.
"""

from cur_modifier.compress import main

if __name__ == "__main__":
    main()
