//! Start files against the images that they are of, and against every kind of damage.

use accel_ufs::index::*;
use accel_ufs::start::{self, Block, LayerStart, MAX_START, StartError};

/// Bytes that differ from block to block; the first begins with zeros, as a superblock's.
fn image(blocks: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = vec![0; blocks * PAGE_SIZE];
    for word in bytes[1024..].chunks_exact_mut(8) {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(99991);
        word.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}

struct Layer {
    image: Vec<u8>,
    index: Vec<u8>,
    root: Root,
    layout: Layout,
}

impl Layer {
    fn new(blocks: usize) -> Self {
        let image = image(blocks, blocks as u64);
        let mut builder = IndexBuilder::new();
        for (number, chunk) in (0..).map(ChunkNo).zip(image.chunks(CHUNK_SIZE)) {
            builder.add(number, chunk).unwrap();
        }
        let size = image.len() as u64;
        let (root, index) = builder.finish(size, ByteRange::new(0, 4096)).unwrap();
        let layout = Layout::new(ImageSize::new(size).unwrap());
        Self {
            image,
            index,
            root,
            layout,
        }
    }

    fn bytes(&self, block: u64) -> Box<Page> {
        let at = usize::try_from(block).unwrap() * PAGE_SIZE;
        Box::new(self.image[at..at + PAGE_SIZE].try_into().unwrap())
    }

    fn prove(&self, block: u64) -> BlockProof {
        let chunk = ChunkNo::containing(block * PAGE_SIZE as u64);
        let range = self.layout.chunk_range(chunk).unwrap();
        let at = usize::try_from(range.offset).unwrap();
        let chunk = &self.image[at..at + usize::try_from(range.length).unwrap()];
        let page = |offset| {
            let at = usize::try_from(offset).unwrap();
            Ok::<Page, ()>(self.index[at..at + PAGE_SIZE].try_into().unwrap())
        };
        self.layout
            .prove_block(self.root, block, chunk, page)
            .unwrap()
    }

    fn start(&self, metadata: ByteRange) -> LayerStart {
        let blocks = LayerStart::wanted(metadata).map(|number| {
            let bytes = self.bytes(number);
            (Block { number, bytes }, self.prove(number))
        });
        let size = self.layout.image_size();
        LayerStart::new(self.root, size, metadata, blocks.collect()).unwrap()
    }
}

/// One block; less than a chunk; chunks; more than a page of the index has values of.
const SIZES: [usize; 10] = [1, 2, 3, 31, 32, 33, 100, 4096, 4097, 9000];

#[test]
fn a_block_is_proven_and_nothing_else_is() {
    for blocks in SIZES {
        let layer = Layer::new(blocks);
        let step = (blocks / 50).max(1);
        let all = 0..blocks as u64;
        for block in all.clone().step_by(step).chain(all.last()) {
            let (bytes, proof) = (layer.bytes(block), layer.prove(block));
            let (layout, root) = (&layer.layout, layer.root);
            assert!(layout.verify_block(root, block, &bytes, &proof), "{block}");
            let mut other = bytes.clone();
            other[4095] ^= 1;
            assert!(!layout.verify_block(root, block, &other, &proof));
            let other = Root([7; 32]);
            assert!(!layout.verify_block(other, block, &bytes, &proof));
            for at in [0, block ^ 1, block + 1, blocks as u64] {
                assert_eq!(layout.verify_block(root, at, &bytes, &proof), at == block);
            }
            for at in 0..proof.values().len() {
                let mut values = proof.values().to_vec();
                values[at][0] ^= 1;
                let wrong = BlockProof::new(values.clone());
                assert!(!layout.verify_block(root, block, &bytes, &wrong));
                values.remove(at);
                let short = BlockProof::new(values);
                assert!(!layout.verify_block(root, block, &bytes, &short));
            }
        }
    }
}

#[test]
fn a_file_reads_back_and_is_small() {
    let made = SIZES.map(|blocks| {
        let size = (blocks * PAGE_SIZE) as u64;
        Layer::new(blocks).start(ByteRange::new(size - 4096, 4096))
    });
    let bytes = start::encode(&made);
    assert_eq!(start::parse(&bytes).unwrap(), made);
    // A block, three quarters of the superblock's, and proofs.
    assert!(
        bytes.len() < made.len() * (2 * 4096 + 1024),
        "{}",
        bytes.len()
    );
    assert_eq!(start::parse(&start::encode([])).unwrap(), []);
}

#[test]
fn layers_that_do_not_fit_are_left_out() {
    let one = Layer::new(9000).start(ByteRange::new(4096 * 4096, 4096));
    let bytes = start::encode(std::iter::repeat_n(&one, 500));
    assert!(bytes.len() <= MAX_START && bytes.len() > MAX_START - 16384);
    let read = start::parse(&bytes).unwrap();
    assert!(read.len() > 80 && read.iter().all(|layer| *layer == one));
}

/// Gives the file a checksum that is right.
fn sign(bytes: &mut [u8]) {
    let (checked, checksum) = bytes.split_last_chunk_mut::<32>().unwrap();
    *checksum = *blake3::hash(checked).as_bytes();
}

#[test]
fn whatever_is_changed_nothing_wrong_comes_out() {
    let layers = [Layer::new(1), Layer::new(40), Layer::new(4097)];
    let made = layers.each_ref().map(|layer| {
        let size = layer.image.len() as u64;
        layer.start(ByteRange::new(size - 4096, 4096))
    });
    let bytes = start::encode(&made);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(start::parse(&changed).is_err(), "byte {at}");
        sign(&mut changed);
        // Only what is called a hint may differ.
        for (read, layer) in start::parse(&changed).iter().flatten().zip(&layers) {
            assert_eq!(read.root(), layer.root, "byte {at}");
            for block in read.blocks() {
                assert_eq!(block.bytes, layer.bytes(block.number), "byte {at}");
            }
        }
    }
    for length in 0..bytes.len() {
        let mut short = bytes[..length].to_vec();
        assert!(start::parse(&short).is_err());
        if length >= 32 {
            sign(&mut short);
            assert!(start::parse(&short).is_err());
        }
    }
    let mut long = bytes.clone();
    long.extend([0; 8]);
    sign(&mut long);
    assert_eq!(start::parse(&long), Err(StartError::Length));
    let mut later = bytes;
    later[8] = 2;
    assert_eq!(start::parse(&later), Err(StartError::Layout(2)));
}
