//! "Did you mean …?"

/// The known word that the written one is closest to, as a suggestion.
pub(super) fn did_you_mean(written: &str, known: &[&str]) -> String {
    let written = written.to_lowercase();
    let closest = known
        .iter()
        .map(|word| (distance(&written, &word.to_lowercase()), word))
        .min_by_key(|(distance, _)| *distance);
    match closest {
        Some((distance, word))
            if distance <= (written.len() / 3).max(if written.len() > 3 { 2 } else { 1 }) =>
        {
            format!("did you mean `{word}`?")
        }
        _ => format!("write one of {}", known.join(", ")),
    }
}

/// Insertions, deletions and replacements from one word to the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
