"""Train an image model, and go on with a run that was interrupted. The loop is recipes/train.py.

python train.py                                    # MaxViT-T on scikit-learn's digits, minutes on a laptop
python train.py model=maxvit_s data=imagefolder data.root=photos
python train.py resume=runs/<name>                 # ends with the weights of a run that was never interrupted
torchrun --nproc-per-node 8 train.py ...           # the same batch, shared by eight devices
python train.py --help                             # models, data sets, recipes
"""

from recipes import shell

shell.answer("train")  # completion of the command line must not wait for the import below

from recipes.train import main

if __name__ == "__main__":
    main()
