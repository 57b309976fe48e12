"""A sparse network in a scikit-learn pipeline, its density chosen by cross-validation."""

from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from noctule import SparseMLPClassifier, footprint

X, X_test, y, y_test = train_test_split(*load_digits(return_X_y=True), random_state=0)
network = SparseMLPClassifier((128, 128), early_stopping=True, random_state=0)
search = GridSearchCV(
    make_pipeline(StandardScaler(), network), {"sparsemlpclassifier__density": [0.05, 0.2]}, cv=2
).fit(X, y)

for parameters, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
    print(f"density {parameters['sparsemlpclassifier__density']:<5} {score:.1%} in cross-validation")
print(f"the best one: {search.score(X_test, y_test):.1%} of the test set right")
model = search.best_estimator_[-1].model_  # an nn.Module, for everything else in Noctule
print(f"its weights and indices: {footprint(model).total_bytes / 1e3:.0f} kB")
