//! Whether a file is on a network file system.
//!
//! There a lost connection would kill a process that maps the file, so such files are read.

use std::fs::File;

/// Whether a file is on a network file system, as far as the system says.
pub(super) fn holds(file: &File) -> bool {
    #[cfg(target_os = "linux")]
    {
        // The low 32 bits are what every architecture has.
        rustix::fs::fstatfs(file).is_ok_and(|found| is_network(found.f_type as u32))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        false
    }
}

/// Whether `statfs` gives this number to a network file system: linux/magic.h, and the sources of
/// those that are not part of the kernel.
#[cfg(target_os = "linux")]
fn is_network(magic: u32) -> bool {
    const NETWORK: [u32; 17] = [
        0x6969,      // NFS
        0x517B,      // SMB
        0xFF53_4D42, // CIFS
        0xFE53_4D42, // SMB2
        0x0BD0_0BD0, // Lustre
        0x6573_5546, // FUSE: sshfs, s3fs, GlusterFS, JuiceFS, …
        0x0102_1997, // 9p
        0x4750_4653, // GPFS
        0x1983_0326, // BeeGFS
        0x00C3_6400, // Ceph
        0xAAD7_AAEA, // PanFS
        0x2003_0528, // OrangeFS
        0x5346_414F, // AFS
        0x6B41_4653, // kAFS
        0x7375_7245, // Coda
        0x564C,      // NCP
        0x0161_1970, // GFS2
    ];
    NETWORK.contains(&magic)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn disks_and_memory_are_local_and_what_a_server_holds_is_not() {
        // ext4, XFS, Btrfs, tmpfs, overlayfs, ZFS.
        for magic in [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x794C_7630, 0x2FC1_2FC1] {
            assert!(!is_network(magic), "{magic:#x}");
        }
        for magic in [0x6969, 0xFF53_4D42, 0x0BD0_0BD0, 0x6573_5546, 0x4750_4653] {
            assert!(is_network(magic), "{magic:#x}");
        }
    }
}
