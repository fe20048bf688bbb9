#!/usr/bin/env bash
# Train a ResNet-18 of torchvision on five classes of CIFAR-10, and fine-tune it on 40 images of each of the other five;
# from random weights, too, for comparison. The accuracy is that of the last epoch, on test images.
#
#     bash experiments/fine_tuning.sh FOLDER    # with cifar-10-batches-py in it
set -e
size=(--data.train_size 32 --data.eval_resize 36 --data.eval_size 32)
fresh=(--model.freeze "" --model.thaw_epoch null --model.layer_decay 1)
fit=(knl fit --config configs/finetune_resnet18.yaml "${size[@]}")

python experiments/cifar_folders.py --root "$1" --to runs/cifar_folders
"${fit[@]}" --data.root runs/cifar_folders/first "${fresh[@]}" --model.backbone torchvision.models.resnet18 \
    --trainer.max_epochs 1 --run_dir runs/cifar_first
knl export --config runs/cifar_first/config.yaml --ckpt_path best --to runs/cifar_weights --format state_dict
for seed in 0 1 2; do
    "${fit[@]}" --data.root runs/cifar_folders/second --seed_everything $seed --model.init_from runs/cifar_weights/weights.pt
    "${fit[@]}" --data.root runs/cifar_folders/second --seed_everything $seed "${fresh[@]}"
done
