//! Numbers that look random and are the same in every run (SplitMix64), so that a
//! failure can be seen again.

/// The generator; two with the same seed give the same numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn same_seed_same_numbers() {
        let (mut a, mut b) = (Random::new(7), Random::new(7));
        assert_eq!(
            [(); 9].map(|()| a.next_u64()),
            [(); 9].map(|()| b.next_u64())
        );
        assert_ne!(Random::new(7).next_u64(), Random::new(8).next_u64());
    }
}
