//! Proofs of single blocks of 4 KiB, which need neither their chunk nor the index.

use super::verify::{hash_piece, left_of, subtree};
use super::{CHUNK_SIZE, ChunkNo, Layout, PAGE, PAGE_SIZE, Page, Root, Step, VALUES_PER_PAGE};
use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

/// What lies beside the way from a block of 4 KiB to the image's root in BLAKE3's tree:
/// one value for every turn, from the root down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockProof(Vec<[u8; 32]>);

impl BlockProof {
    /// A proof of these values, right or wrong.
    pub const fn new(values: Vec<[u8; 32]>) -> Self {
        Self(values)
    }

    /// Its values.
    pub fn values(&self) -> &[[u8; 32]] {
        &self.0
    }
}

/// Appends the values beside the way to number `at` of `values`.
fn beside(values: &[ChainingValue], at: usize, out: &mut Vec<ChainingValue>) {
    let (mut values, mut at) = (values, at);
    while values.len() > 1 {
        let (left, right) = values.split_at(left_of(values.len()));
        if at < left.len() {
            out.push(subtree(right));
            values = left;
        } else {
            out.push(subtree(left));
            (values, at) = (right, at - left.len());
        }
    }
}

impl Layout {
    fn blocks(&self) -> u64 {
        self.image_size().bytes() / PAGE
    }

    /// The way from the root to block number `block`: for every turn, whether it goes left.
    fn turns(&self, block: u64) -> Vec<bool> {
        let (mut blocks, mut at, mut turns) = (self.blocks(), block, Vec::new());
        while blocks > 1 {
            let left = blocks.next_power_of_two() / 2;
            turns.push(at < left);
            (blocks, at) = match at.checked_sub(left) {
                None => (left, at),
                Some(at) => (blocks - left, at),
            };
        }
        turns
    }

    /// How many values the proof of block number `block` has.
    pub fn proof_length(&self, block: u64) -> usize {
        self.turns(block).len()
    }

    /// Makes the proof of block number `block`, which lies in the image, from its chunk's
    /// bytes and the pages of the index on the way there. Neither is checked: whether
    /// the proof is right shows [`verify_block`](Self::verify_block).
    ///
    /// # Errors
    /// Those of `page`, which reads a page of the index at this offset of its file.
    pub fn prove_block<E>(
        &self,
        root: Root,
        block: u64,
        chunk: &[u8],
        mut page: impl FnMut(u64) -> Result<Page, E>,
    ) -> Result<BlockProof, E> {
        let number = ChunkNo::containing(block * PAGE);
        let mut values = Vec::new();
        if let Ok(mut walk) = self.walk(root, number) {
            while let Step::Fetch {
                page: which, range, ..
            } = walk.step()
            {
                let bytes = page(range.offset)?;
                let (all, _) = bytes.as_chunks::<32>();
                let below = number.0 >> (7 * which.level());
                // Less than 128.
                let at = usize::try_from(below % VALUES_PER_PAGE as u64).unwrap_or(0);
                beside(&all[..self.values_in(which)], at, &mut values);
                walk.supply_verified(&bytes);
            }
        }
        let first = number.0 * (CHUNK_SIZE / PAGE_SIZE) as u64;
        let blocks = chunk.chunks(PAGE_SIZE).zip(first..);
        let blocks: Vec<_> = blocks
            .map(|(bytes, number)| hash_piece(number * PAGE, bytes).finalize_non_root())
            .collect();
        // Less than 32.
        let at = usize::try_from(block - first).unwrap_or(0);
        beside(&blocks, at, &mut values);
        Ok(BlockProof(values))
    }

    /// Whether `bytes` are what the root promises of block number `block`.
    pub fn verify_block(&self, root: Root, block: u64, bytes: &Page, proof: &BlockProof) -> bool {
        let turns = self.turns(block);
        if block >= self.blocks() || proof.0.len() != turns.len() {
            return false;
        }
        let turns: Vec<_> = turns.into_iter().zip(&proof.0).collect();
        let Some((last, below)) = turns.split_first() else {
            return *blake3::hash(bytes).as_bytes() == root.0;
        };
        let mut value = hash_piece(block * PAGE, bytes).finalize_non_root();
        let pair = |goes_left: bool, own, beside| {
            if goes_left {
                (own, beside)
            } else {
                (beside, own)
            }
        };
        for (goes_left, beside) in below.iter().rev() {
            let (left, right) = pair(*goes_left, value, **beside);
            value = merge_subtrees_non_root(&left, &right, Mode::Hash);
        }
        let (left, right) = pair(last.0, value, *last.1);
        merge_subtrees_root(&left, &right, Mode::Hash) == root.0
    }
}
