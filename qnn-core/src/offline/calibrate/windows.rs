//! Which parts of a calibration text are used.

use super::CalibrateError;

/// At most `max` windows of `window` ids, spread evenly over `ids`. Windows do not overlap; what does not fill a window at
/// the end is left out, except where the text is shorter than one window: then all of it is the only window.
///
/// # Errors
/// [`CalibrateError::NoWindows`] if `window` or `max` is 0; [`CalibrateError::Empty`] if there is nothing to cut.
pub fn spread_windows(ids: &[u32], window: usize, max: usize) -> Result<Vec<&[u32]>, CalibrateError> {
    if window == 0 || max == 0 {
        return Err(CalibrateError::NoWindows { max, window });
    }
    if ids.is_empty() {
        return Err(CalibrateError::Empty { have: ids.len(), window });
    }
    let all: Vec<&[u32]> = ids.chunks_exact(window).collect();
    if all.is_empty() {
        return Ok(vec![ids]);
    }
    let n = all.len().min(max);
    Ok((0..n).map(|i| all[i * all.len() / n]).collect())
}

/// The same, where each window begins with `opening` (BOS, for models that were trained with one before each text), which
/// counts among its ids. Windows that begin with it anyway do not get another.
///
/// # Errors
/// As [`spread_windows`].
pub fn opened_windows(
    ids: &[u32],
    opening: &[u32],
    window: usize,
    max: usize,
) -> Result<Vec<Vec<u32>>, CalibrateError> {
    let own = window.saturating_sub(opening.len()).max(window.min(1));
    let opened = |ids: &[u32]| if ids.starts_with(opening) { ids.to_vec() } else { [opening, ids].concat() };
    Ok(spread_windows(ids, own, max)?.into_iter().map(opened).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: windows come from the whole text, in order, without overlap; an empty set is refused.
    #[test]
    fn windows_are_spread_over_the_text() {
        let ids: Vec<u32> = (0..100).collect();
        let starts = |window, max| -> Vec<u32> {
            spread_windows(&ids, window, max).expect("a text").iter().map(|w| w[0]).collect()
        };
        assert_eq!(starts(10, 3), [0, 30, 60]);
        assert_eq!(starts(30, 10), [0, 30, 60]);
        assert_eq!(spread_windows(&ids, 200, 4).expect("a short text"), [&ids[..]]);
        assert!(matches!(spread_windows(&[], 10, 3), Err(CalibrateError::Empty { have: 0, window: 10 })));
        assert!(matches!(spread_windows(&ids, 10, 0), Err(CalibrateError::NoWindows { max: 0, window: 10 })));
        assert!(matches!(spread_windows(&ids, 0, 3), Err(CalibrateError::NoWindows { max: 3, window: 0 })));
    }

    // Guards: every window begins as a text does at run time, once, and has no more ids than were asked for.
    #[test]
    fn windows_begin_as_texts_do() {
        let ids = [9, 1, 2, 3, 4, 5];
        assert_eq!(opened_windows(&ids, &[9], 4, 2).expect("a text"), [vec![9, 1, 2], vec![9, 3, 4, 5]]);
        assert_eq!(opened_windows(&ids, &[], 3, 2).expect("a text"), [&ids[..3], &ids[3..]]);
        assert!(matches!(opened_windows(&ids, &[9], 0, 3), Err(CalibrateError::NoWindows { max: 3, window: 0 })));
    }
}
