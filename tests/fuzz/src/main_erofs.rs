//! `tools/fuzz erofs`: see the module `erofs`.
#![no_main]

mod erofs;

libfuzzer_sys::fuzz_target!(|image: &[u8]| erofs::run(image));

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    // One in eight may keep a wrong checksum.
    if seed % 8 != 0 {
        sum(&mut data[..size]);
    }
    size
});

/// Makes the superblock's checksum right.
fn sum(image: &mut [u8]) {
    let Some(block) = image.get_mut(1024..4096) else {
        return;
    };
    block[4..8].fill(0);
    let mut register = !0u32;
    for byte in &*block {
        register ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = register & 1;
            register = (register >> 1) ^ (carry * 0x82f6_3b78);
        }
    }
    block[4..8].copy_from_slice(&register.to_le_bytes());
}
