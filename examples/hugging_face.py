"""A sparse Hugging Face model: converted, trained, saved and loaded. Its weights are random, so nothing is downloaded."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

from noctule import ToSparse, attach, convert_, param_groups, set_

torch.manual_seed(0)
config = BertConfig(
    vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=2
)
model = BertForSequenceClassification(config)
print(convert_(model, ToSparse(density=0.2)))

tokens = torch.randint(32, (512, 12))
labels = (tokens < 8).sum(1).gt(2).long()  # are there more than two small tokens?
optimizer = torch.optim.AdamW(param_groups(model), lr=0.002)
with attach(model, optimizer, set_(every=20)):
    for epoch in range(5):
        for batch in torch.randperm(len(tokens)).split(32):
            optimizer.zero_grad()
            loss = model(input_ids=tokens[batch], labels=labels[batch]).loss
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # values and places; config.json says which layers are sparse
    again = BertForSequenceClassification.from_pretrained(folder)
model.eval()
again.eval()
with torch.no_grad():
    same = torch.equal(model(input_ids=tokens).logits, again(input_ids=tokens).logits)
print(f"loaded again, the outputs are {'the same' if same else 'DIFFERENT'}")
