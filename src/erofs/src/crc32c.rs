//! CRC-32C (Castagnoli), as the superblock's checksum needs it.

/// The reflected polynomial.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The CRC register after `bytes`, started at `register`, without the final
/// inversion. The kernel starts it with all ones.
pub fn update(register: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(register, |mut register, &byte| {
        register ^= u32::from(byte);
        for _ in 0..8 {
            let carry = register & 1;
            register = (register >> 1) ^ (POLYNOMIAL * carry);
        }
        register
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_check_value_of_the_catalogue() {
        // CRC-32C ("iSCSI") of "123456789" is 0xe3069283, after the inversion.
        assert_eq!(!super::update(!0, b"123456789"), 0xe306_9283);
    }
}
