"""What was trained, as it is deployed: codes and scales, packed models, files for the programs that run them.

weights       `quantized`: each weight's codes and scales, which everything else here is made of
packed_model  `quantize`: a plain model with its weights packed in memory
content       all that is exported of a model
layout        what a layout is; layouts/ has them, one a file
huggingface   what every layout of a Hugging Face checkpoint writes
sharing       one tensor scale for weights that a client multiplies as one
elements      the kinds of codes that clients have
exporting     `export`
loading       `load`
verifying     `verify`
progress      a bar for what takes long
writing       files that are there whole or not at all
manifest      what describes an exported folder
"""
