"""Evaluate weights on a validation set, beside the published figure, or predict on images. See recipes/eval.py.

python eval.py run=runs/<name>                               # the number that training printed
python eval.py checkpoint=gcvit_1k_tiny.pth.tar data=imagenet data.root=imagenet    # the model is read from the file
python eval.py checkpoint=[a.pth,b.pth] data=imagenet data.root=imagenet            # one table; or a folder of files
python eval.py checkpoint=nat_mini_upernet.pth task=segment data=ade20k data.root=ADEChallengeData2016
python eval.py run=runs/<name> predict=cat.jpg
torchrun --nproc-per-node 8 eval.py run=runs/<name>          # eight devices, every image counted once
"""

import sys

try:
    from recipes import shell

    shell.answer("eval")  # shell completion must not wait for the import below

    from recipes.eval import main
except KeyboardInterrupt:  # which the seconds that this takes invite
    sys.exit(130)

if __name__ == "__main__":
    main()
