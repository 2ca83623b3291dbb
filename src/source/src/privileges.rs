//! Giving up what a process does not need.
//!
//! A process that runs as root has all capabilities, and so has every program that it
//! starts. Here both end: what is not named is taken from the permitted set and from
//! the bounding set, and no program started later can gain anything (`no_new_privs`).

use rustix::io::Errno;
pub use rustix::thread::CapabilitySet;
use rustix::thread::CapabilitySets;

/// What a process needs that only reads files, whoever owns them.
pub const READ: CapabilitySet = CapabilitySet::DAC_READ_SEARCH;

/// What one needs that also writes in directories that may belong to others.
pub const WRITE: CapabilitySet = READ.union(CapabilitySet::DAC_OVERRIDE);

/// Gives up every capability but these, for this thread and all that it starts: to be
/// called while there is only one. Those in `kept` that it does not have, it does not
/// get.
pub fn keep_only(kept: CapabilitySet) -> rustix::io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(false) => {}
            // Without CAP_SETPCAP the set stays, and `no_new_privs` keeps it useless.
            Ok(true) => match rustix::thread::remove_capability_from_bounding_set(capability) {
                Ok(()) | Err(Errno::PERM) => {}
                Err(error) => return Err(error),
            },
            // The kernel has no more than those before.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    match rustix::thread::clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error),
    }
    let left = rustix::thread::capabilities(None)?.permitted & kept;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: left,
            permitted: left,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    rustix::thread::set_no_new_privs(true)
}
