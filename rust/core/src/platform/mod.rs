//! What differs between operating systems; nothing else asks which one it runs on.
//!
//! Both files have the same functions. Advice that a system does not take costs time or memory alone.

#[cfg(unix)]
mod unix;
#[cfg(unix)]
pub(crate) use unix::*;

#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub(crate) use windows::*;

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn a_directory_has_one_lock_and_is_listed_filled_and_renamed_under_it() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("from"), root.path().join("to"));
        fs::create_dir(&from).unwrap();
        let lock = lock_directory(&from).unwrap();
        assert!(lock.is_some());
        assert!(lock_directory(&from).unwrap().is_none());
        fs::write(from.join("file"), b"x").unwrap();
        assert_eq!(fs::read_dir(&from).unwrap().count(), 1);
        fs::rename(&from, &to).unwrap();
        sync_directory(&to).unwrap();
        drop(lock);
        assert!(lock_directory(&to).unwrap().is_some());
        assert!(lock_directory(&to.join("file")).is_err());
    }

    #[test]
    fn bytes_are_written_and_read_at_their_place_and_not_beyond_the_end() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        let file = File::create_new(&path).unwrap();
        reserve(&file, 8).unwrap();
        write_all_at(&file, b"later", 3).unwrap();
        write_all_at(&file, b"now", 0).unwrap();
        start_writing(&file, 0, 8);
        let file = open_at_once(&path).unwrap();
        let mut found = [0; 6];
        read_exact_at(&file, &mut found, 2).unwrap();
        assert_eq!(&found, b"wlater");
        let error = read_exact_at(&file, &mut found, 3).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
        assert!(free_nbytes(root.path()).unwrap().0 > 8);
    }

    #[test]
    fn one_file_has_one_number_whatever_it_is_called() {
        let root = tempfile::tempdir().unwrap();
        let [one, linked, other] = ["one", "linked", "other"].map(|name| root.path().join(name));
        fs::write(&one, b"x").unwrap();
        fs::write(&other, b"x").unwrap();
        fs::hard_link(&one, &linked).unwrap();
        assert!(is_same_file(&one, &linked));
        assert!(!is_same_file(&one, &other));
        assert!(!is_same_file(root.path(), root.path()));
        let number = |path| {
            let file = File::open(path).unwrap();
            inode(&file, &file.metadata().unwrap()).unwrap()
        };
        assert_eq!(number(&one), number(&linked));
        assert_ne!(number(&one), number(&other));
    }
}
