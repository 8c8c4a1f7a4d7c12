"""Train an image model, or resume a run that was interrupted. The training loop is in recipes/train.py.

python train.py                                    # MaxViT-T on scikit-learn's digits, minutes on a laptop
python train.py model=maxvit_s data=imagefolder data.root=photos
python train.py resume=runs/<name>                 # ends with the weights of a run that was never interrupted
torchrun --nproc-per-node 8 train.py ...           # the same batch, split over eight devices
python train.py --help                             # models, data sets, recipes
"""

import sys

try:
    from recipes import shell

    shell.answer("train")  # shell completion must not wait for the import below

    from recipes.train import main
except KeyboardInterrupt:  # which the seconds that this takes invite
    sys.exit(130)

if __name__ == "__main__":
    main()
