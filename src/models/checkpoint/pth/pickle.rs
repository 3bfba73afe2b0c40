//! Pickles: objects without code, of limited size.

use std::collections::HashMap;

use candle_core::pickle::{Object, Stack};
use candle_core::{Result, bail};

/// The last protocol of pickles that can be read; torch.save writes it unless it is told otherwise.
pub(super) const PROTOCOL: u8 = 2;

/// The protocol that a pickle begins with.
pub(super) fn protocol(bytes: &[u8]) -> Option<u8> {
    match bytes {
        [0x80, protocol, ..] => Some(*protocol),
        _ => None,
    }
}

/// Description of a file of pickle protocol `protocol`, with the remedy.
pub(in crate::models::checkpoint) fn other_protocol(protocol: u8) -> String {
    format!(
        "a pickle of protocol {protocol}; save it in protocol {PROTOCOL}, as is the default: \
        torch.save(.., pickle_protocol={PROTOCOL})"
    )
}

/// The object of a pickle, which is taken off the front of `bytes`.
///
/// candle's machine takes one operation at a time: those that would make it fail or grow without
/// end are seen before.
pub(super) fn unpickle(bytes: &mut &[u8]) -> Result<Object> {
    let protocol = protocol(bytes).unwrap_or_default();
    // From the fourth on, a pickle has frames.
    if protocol > 3 {
        bail!("expected a state dict, got {}", other_protocol(protocol))
    }
    let mut stack = Stack::empty();
    let mut limits = Limits::new(bytes.len());
    loop {
        let operation = bytes.first().copied().unwrap_or_default();
        let next = *bytes;
        let before = stack.stack().len();
        let stop = match next {
            // A whole number beyond 64 bits, such as a seed: no tensor needs it.
            [0x8a, len, rest @ ..] if *len > 8 => {
                *bytes = rest.get(usize::from(*len)..).unwrap_or_default();
                stack.read(&mut &b"N"[..])?
            }
            // A text of Python 2.
            [b'U', len, rest @ ..] if rest.len() >= usize::from(*len) => {
                let (text, rest) = rest.split_at(usize::from(*len));
                *bytes = rest;
                let unicode = [&[b'X', *len, 0, 0, 0], text].concat();
                stack.read(&mut unicode.as_slice())?
            }
            [] => bail!("expected a longer pickle: the file was cut off; fetch it again"),
            [b'X', a, b, c, d, rest @ ..]
                if u32::from_le_bytes([*a, *b, *c, *d]) as usize > rest.len() =>
            {
                bail!("expected a longer pickle: the file was cut off; fetch it again")
            }
            _ => match stack.read(bytes) {
                Ok(stop) => stop,
                Err(_) if protocol > PROTOCOL => {
                    bail!("expected a state dict, got {}", other_protocol(protocol))
                }
                Err(e) => bail!(
                    "its pickle has something other than numbers, texts and tensors in it ({e}); \
                    save model.state_dict() alone, or as safetensors"
                ),
            },
        };
        if stop {
            return stack.finalize();
        }
        limits.take(operation, next, before, stack.stack().len())?;
    }
}

/// Size and depth of the objects of a pickle. A pickle may take the same object again and again, so
/// that a short one has no limit of
/// its own, and what is nested without end overflows the stack when it is dropped.
struct Limits {
    most: u64,
    stack: Vec<Extent>,
    memo: HashMap<u32, Extent>,
    /// The sizes of all in `stack` and `memo`.
    total: u64,
}

#[derive(Clone, Copy)]
struct Extent {
    depth: u32,
    size: u64,
}

impl Limits {
    /// A state dict of a model has some tens.
    const DEPTH: u32 = 128;
    /// About 70 objects describe a tensor, those in the memo included.
    const SIZE: u64 = 1 << 24;

    /// Limits of a pickle of `bytes` bytes: a tensor takes more than a hundred of them.
    fn new(bytes: usize) -> Self {
        Self {
            most: (8 * bytes as u64).clamp(1000, Self::SIZE),
            stack: vec![],
            memo: HashMap::new(),
            total: 0,
        }
    }

    /// Takes in an operation that left `after` objects of `before` on the machine's stack.
    fn take(&mut self, operation: u8, code: &[u8], before: usize, after: usize) -> Result<()> {
        let id = match (operation, code) {
            (b'q' | b'h', [_, id, ..]) => u32::from(*id),
            (b'r' | b'j', [_, a, b, c, d, ..]) => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => 0,
        };
        let one = Extent { depth: 1, size: 1 };
        match operation {
            // The version of the format.
            0x80 => {}
            b'q' | b'r' => {
                let top = self.stack.last().copied().unwrap_or(one);
                self.total += top.size;
                if let Some(old) = self.memo.insert(id, top) {
                    self.total -= old.size;
                }
            }
            _ if after > before => {
                let pushed = match operation {
                    b'h' | b'j' => self.memo.get(&id).copied().unwrap_or(one),
                    _ => one,
                };
                self.total += pushed.size;
                self.stack.push(pushed);
            }
            _ => {
                let popped = self
                    .stack
                    .split_off(after.saturating_sub(1).min(self.stack.len()));
                let size: u64 = popped.iter().map(|e| e.size).sum();
                let depth = |of: &[Extent]| of.iter().map(|e| e.depth).max().unwrap_or(0);
                let depth = match (operation, popped.as_slice()) {
                    // What is added to a list or dict does not nest that further.
                    (b'a' | b'e' | b's' | b'u', [to, added @ ..]) => to.depth.max(depth(added) + 1),
                    (_, all) => depth(all) + 1,
                };
                self.total += 1;
                self.stack.push(Extent {
                    depth,
                    size: size + 1,
                });
            }
        }
        let deepest = self.stack.last().map_or(0, |e| e.depth);
        if deepest > Self::DEPTH || self.total > self.most {
            bail!(
                "expected a pickle of at most {} objects, nested {} deep at most; save \
                model.state_dict() alone",
                self.most,
                Self::DEPTH
            )
        }
        Ok(())
    }
}
