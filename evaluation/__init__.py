"""What evaluate.py can do with a checkpoint. No method file imports this package; it opens them by
their name.

protocols.py   one function for each protocol and each kind of picture that the command offers
features.py    features kept on disk, and of several blocks of a transformer
robustness.py  zero-shot accuracy on ImageNet's other test sets beside ImageNet
scores.py      accuracy, mean recall of the classes and ROC AUC
probes.py      linear classifiers on frozen features
finetune.py    training the whole network on labels
pictures.py    attention maps, components, matches and neighbours as images
language.py    pictures that a text asks for: explanations, search, the captions in DeCLIP's queue
weights.py     weights in: our checkpoints and published ones
results.py     the table, results.jsonl and picture files that the command leaves
exports.py     weights out: for timm, torchvision, open_clip, transformers
"""
